"""What an adversary can prove about a mechanism from what it released: lower bounds on ε."""
