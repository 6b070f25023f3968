"""Read datasets, prepare stores, and load batches on the device."""
