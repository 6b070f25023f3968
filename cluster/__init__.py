"""Where a trial runs: its folder, the job that trains it, and the relay that submits and watches jobs."""
