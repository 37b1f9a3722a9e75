"""A call, whatever transport it came by: who asks, what it is answered, how it is booked and remembered."""
