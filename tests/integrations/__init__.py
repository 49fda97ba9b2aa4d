"""The integrations against the conventions of the trainers they extend, and against stand-ins of their interfaces."""
