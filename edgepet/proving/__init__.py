"""What is compared with what; opening any pack or artefact; choosing a precision."""
