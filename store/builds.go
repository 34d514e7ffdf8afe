package store

import (
	"encoding/json"
	"time"

	"nbd/nixproto"
)

// A BuildID names a build record. Ids grow with time and begin at 1.
type BuildID uint64

// The states of a build: pending and running, and how it ended.
const (
	StatusPending           = "pending"
	StatusRunning           = "running"
	StatusBuilt             = "built"
	StatusBuildFailed       = "build_failed"
	StatusTimeout           = "timeout"
	StatusInternalError     = "internal_error"
	StatusLogLimit          = "log_limit"
	StatusOutOfMemory       = "out_of_memory"
	StatusMaxMemoryExceeded = "max_memory_exceeded"
	StatusClientDisconnect  = "client_disconnect"
	StatusCancelled         = "cancelled"
	StatusClientError       = "client_error"
)

// A Build is the record of one run.
type Build struct {
	ID      BuildID            `json:"id"`
	Account AccountID          `json:"account"`
	DrvPath nixproto.StorePath `json:"drvPath"`
	Name    string             `json:"name"`
	System  string             `json:"system"`
	Status  string             `json:"status"` // one of the Status constants
	// Error is one line for a person; empty on success.
	Error string `json:"error,omitempty"`

	Created time.Time `json:"created"`
	Started time.Time `json:"started,omitzero"`
	Stopped time.Time `json:"stopped,omitzero"`

	CPUUser     time.Duration `json:"cpuUser,omitempty"`
	CPUSystem   time.Duration `json:"cpuSystem,omitempty"`
	CPUs        int           `json:"cpus,omitempty"`
	MemoryMiB   int           `json:"memoryMiB,omitempty"`
	PeakMemory  int64         `json:"peakMemory,omitempty"`  // bytes
	PeakStorage int64         `json:"peakStorage,omitempty"` // bytes
	LogSize     int64         `json:"logSize,omitempty"`     // bytes, uncompressed

	Outputs []BuildOutput     `json:"outputs,omitempty"`
	Tags    map[string]string `json:"tags,omitempty"`
	// Key is the reuse key in hex; empty if the build has none.
	Key string `json:"key,omitempty"`
	// Generation is the sandbox generation that it ran in.
	Generation string `json:"generation,omitempty"`

	RestartOf   BuildID `json:"restartOf,omitempty"`
	RestartedAs BuildID `json:"restartedAs,omitempty"`
	ReusedFrom  BuildID `json:"reusedFrom,omitempty"`

	// Extra is what the server keeps with the build besides; the store does
	// not look into it.
	Extra json.RawMessage `json:"extra,omitempty"`
}

// A BuildOutput is one output of a build that succeeded.
type BuildOutput struct {
	Name    string             `json:"name"`
	Path    nixproto.StorePath `json:"path"`
	NarHash string             `json:"narHash"` // "sha256:<nix32>"
	NarSize uint64             `json:"narSize"` // bytes
}

// BuildFilter selects builds. Zero fields select all.
type BuildFilter struct {
	From, To time.Time // Created within [From, To)
	Status   []string
	Before   BuildID // only ids below, for paging
	Limit    int
	// Match, if not nil, has the last word.
	Match func(*Build) bool
}
