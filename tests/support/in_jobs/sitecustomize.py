"""Brings the hold points into drivers and jobs: python runs this first where PYTHONPATH names the folder."""

import os

import warm_start

if os.environ.get("LORVP_TEST_HOLDS"):
    import hold_points

    hold_points.install(begins=not warm_start.was_forked())
if warm_start.wanted():
    warm_start.take_place()
