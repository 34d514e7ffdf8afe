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
	// Permissions of the keys; nil means all for a new account, else what its
	// default-permissions say.
	Permissions []string `json:"permissions"`
}

// Freed is what a collection freed.
type Freed struct {
	Bytes uint64 `json:"freedBytes"` // on disk
}

// A Setting is a setting as it counts somewhere.
type Setting struct {
	Name string `json:"name"`
	// Value is a boolean, a number, a text or a list of texts, without secrets;
	// nil if there is none. Text is how it is set.
	Value  any    `json:"value"`
	Text   string `json:"text"`
	Origin string `json:"origin"`
}

// A SettingsOwner names whose settings are asked for: those of a key by its
// fingerprint, else of an account, else of the system.
type SettingsOwner struct {
	Account string `json:"account,omitempty"`
	Key     string `json:"key,omitempty"`
}

// A SettingChange changes a setting. Op is set, add, remove or reset.
type SettingChange struct {
	SettingsOwner
	Name  string `json:"name"`
	Op    string `json:"op"`
	Value string `json:"value,omitempty"`
}

// A Link joins two accounts.
type Link struct {
	A string `json:"a"`
	B string `json:"b"`
}

// A TokenInfo is a token as operators see it, without its secret.
type TokenInfo struct {
	Account     string    `json:"account"`
	Name        string    `json:"name"`
	Permissions []string  `json:"permissions"`
	Created     time.Time `json:"created"`
	Expires     time.Time `json:"expires,omitzero"` // zero is never
}

// A NewToken request makes a token.
type NewToken struct {
	Account string `json:"account"`
	Name    string `json:"name"`
	// Permissions of the token; nil means what the account's
	// default-permissions say.
	Permissions []string `json:"permissions"`
	// Seconds is how long it is good; 0 means for ever.
	Seconds int64 `json:"seconds"`
}

// An AddedToken is a new token with its secret, which is told this once.
type AddedToken struct {
	Secret string `json:"token"`
	TokenInfo
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
