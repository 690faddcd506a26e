"""Tasks whose contexts have pictures."""
