"""What the tests of several folders share: the textbook, random problems, tolerances and the list of backends."""
