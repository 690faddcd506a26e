"""What to take: comparisons that intervals bear out, recommendations among measured points alone, and three studies."""
