package store

import (
	"time"
)

// An AccountID identifies an account and its view of the store. Ids begin at 1
// and are never used again.
type AccountID uint64

// An Account owns keys, a view of the store, and builds.
type Account struct {
	ID   AccountID
	Name string
	// Created is when the account was made.
	Created time.Time
	// PublicKey is the public half of the key that signs what the account
	// builds, "<server name>/<account>-1:<base64>".
	PublicKey string
}

// A Key is an SSH public key that opens an account.
type Key struct {
	// Wire is the key in SSH wire format (ssh.PublicKey.Marshal).
	Wire []byte
	// Type is the algorithm's name, the first field of Wire, for display.
	Type string
	// Fingerprint is "SHA256:" and unpadded base64, as OpenSSH prints it. It is
	// computed from Wire by the store.
	Fingerprint string
	// Comment is what followed the key in its file.
	Comment string
	// Permissions are those of Permissions() that the key has; nil means all
	// when a key is added, none is an empty slice.
	Permissions []string
	// Added is set by the store.
	Added time.Time
}
