"""Data, specs, bundles and folders of sweeps that several tests start from."""
