"""Where a trial runs: its folder, the job that trains it, and the job manager that submits and watches jobs."""
