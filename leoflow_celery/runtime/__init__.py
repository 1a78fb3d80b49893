"""What an embedded system runs beside its workers."""
