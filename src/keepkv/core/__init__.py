"""What every piece sees: slots, rotations, budgets, schedules, names. Knows torch alone."""
