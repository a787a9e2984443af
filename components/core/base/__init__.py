"""What every package stands on: errors, checked configurations, processes, scratch folders, fault injection."""
