"""What compression changes, without labels: replies of the compressed cache against those of the full one."""
