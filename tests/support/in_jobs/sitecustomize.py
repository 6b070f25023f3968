"""Brings the hold points into drivers and jobs: python runs this first where PYTHONPATH names the folder."""

import os

if os.environ.get("LORVP_TEST_HOLDS"):
    import hold_points

    hold_points.install()
