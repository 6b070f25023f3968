"""What a sweep is: the model of its YAML file, how the file is read, and the reference of its keys."""
