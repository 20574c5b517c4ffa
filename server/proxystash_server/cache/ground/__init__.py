"""What everything else stands on: locks, group commit, files, kill points."""
