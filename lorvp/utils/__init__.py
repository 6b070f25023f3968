"""Hold the helpers that all packages use: files, error messages, commands, plugins, the device, several processes."""
