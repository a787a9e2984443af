"""The ground all stages stand on; knows no stage."""
