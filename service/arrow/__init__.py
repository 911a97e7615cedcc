"""Arrow IPC streams: columns of raw values in, a prediction a row out. Nothing else in the service imports pyarrow."""
