"""A sweep from its first trial to its end: the driver, and what follows the trials for MLflow and the screen."""
