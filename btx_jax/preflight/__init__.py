"""What a run would cost on devices that are not here, read from its compiled program."""
