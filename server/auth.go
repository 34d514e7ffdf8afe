package server

import "slices"

// A Permission is what a key may do; it is spelled as operators spell it.
type Permission string

// The permissions. One on the store without one on builds makes a pure cache
// credential.
const (
	BuildRead    Permission = "build:read"
	BuildWrite   Permission = "build:write"
	StoreRead    Permission = "store:read"
	StoreWrite   Permission = "store:write"
	AccountRead  Permission = "account:read"
	AccountWrite Permission = "account:write"
)

// A Client is who is at the other end of a connection: one key of one account.
// It does not change.
type Client struct {
	Account     uint64
	AccountName string
	Fingerprint string // of the key: "SHA256:…"
	Permissions []Permission
}

// Can reports whether the client's key has a permission.
func (c *Client) Can(p Permission) bool { return slices.Contains(c.Permissions, p) }
