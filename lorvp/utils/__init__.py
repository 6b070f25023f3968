"""What every room of the house uses: files, error lines, commands, choices by name, the device, several processes."""
