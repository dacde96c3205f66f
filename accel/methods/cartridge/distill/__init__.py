"""How a cartridge is made: self-study, start, training, and the quick fit without training."""
