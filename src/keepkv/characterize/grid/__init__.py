"""What is measured: four levels, all their combinations, and the order in which they are run."""
