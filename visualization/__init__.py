"""Recorded runs -> tables and charts. Reads results/ and nothing else."""
