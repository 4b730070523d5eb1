"""What racing saves, and what it claims: agreement against cost, calibration, wall time."""
