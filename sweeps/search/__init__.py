"""The search: what is tried next, what is given up early, and Ray Tune's controller, which asks for both."""
