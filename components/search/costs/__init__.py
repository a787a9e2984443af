"""What every sub-block costs: counted, predicted or measured."""
