package adminapi

import (
	"time"

	"nbd/vm"
)

// Socket is the name of the operator's socket in the state directory.
const Socket = "admin.sock"

// MaxBody bounds one request, in bytes.
const MaxBody = 1 << 20

// An Error is the operator's own mistake, with the way out.
type Error struct {
	Text string `json:"error"`
	Hint string `json:"hint,omitempty"`
}

func (e *Error) Error() string { return e.Text }

// A Status is what `nbd admin status` tells. Its JSON form is relied on by
// scripts.
type Status struct {
	Version string    `json:"version"`
	PID     int       `json:"pid"`
	State   string    `json:"state"` // directory
	Started time.Time `json:"started"`
	// SSH is the address that the server listens on.
	SSH string `json:"ssh"`
	// HostKey is the server's public key as in known_hosts: type and base64.
	HostKey  string     `json:"hostKey"`
	Systems  []string   `json:"systems"`
	Features []string   `json:"features"`
	Sessions int        `json:"sessions"`
	Queue    Queue      `json:"queue"`
	Guests   vm.Status  `json:"guests"`
	Store    StoreState `json:"store"`
}

// A StoreState says how much a store holds.
type StoreState struct {
	Accounts int    `json:"accounts"`
	Paths    int    `json:"paths"` // of all views
	Blobs    int    `json:"blobs"`
	Bytes    uint64 `json:"bytes"`     // of the blobs
	FreeDisk uint64 `json:"freeBytes"` // on the store's file system
}

// An AccountInfo is an account as operators see it.
type AccountInfo struct {
	Name      string    `json:"name"`
	Created   time.Time `json:"created"`
	PublicKey string    `json:"publicKey"`
	Keys      []KeyInfo `json:"keys"`
}

// A KeyInfo is an SSH key as operators see it.
type KeyInfo struct {
	Account     string    `json:"account"`
	Type        string    `json:"type"`
	Fingerprint string    `json:"fingerprint"`
	Comment     string    `json:"comment"`
	Permissions []string  `json:"permissions"`
	Added       time.Time `json:"added"`
}

// A NewKeys request adds SSH keys, each a line as in authorized_keys.
type NewKeys struct {
	Account string   `json:"account"`
	Keys    []string `json:"keys"`
	// Permissions of the keys; nil means all.
	Permissions []string `json:"permissions"`
}

// Freed is what a collection freed.
type Freed struct {
	Bytes uint64 `json:"freedBytes"` // on disk
}

// A Queue says what runs and waits, and how much room there is.
type Queue struct {
	Running int  `json:"running"`
	Waiting int  `json:"waiting"`
	Total   Room `json:"total"`
	Free    Room `json:"free"`
}

// Room is an amount of what guests take.
type Room struct {
	Guests    int
	MemoryMiB int // of the host's memory
	CPUs      int
}
