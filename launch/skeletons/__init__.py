"""Models without weights: what launch/plan.py rehearses, a function a method, named in its row of the table."""
