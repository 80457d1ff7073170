"""One folder, one op. A room knows no other room; what they share lies beside this folder."""
