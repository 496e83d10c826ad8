//! NBD front end.
