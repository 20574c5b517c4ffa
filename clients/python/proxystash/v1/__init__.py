"""The generated stubs of the contract, `protos/proxystash/v1`."""
