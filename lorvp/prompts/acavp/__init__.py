"""ACAVP's prompt, an affine transformation and a change of colours before what is added."""
