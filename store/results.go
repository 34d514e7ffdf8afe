package store

import (
	"time"

	"nbd/nixproto"
)

// A Result is the first success stored under a reuse key.
type Result struct {
	Build   BuildID   `json:"build"`
	Account AccountID `json:"account"` // that ran it
	Time    time.Time `json:"time"`
	// Outputs are the outputs with their content, by name.
	Outputs map[string]ResultOutput `json:"outputs"`
}

// A ResultOutput is an output's path and content.
type ResultOutput struct {
	Path       nixproto.StorePath   `json:"path"`
	NarHash    string               `json:"narHash"` // "sha256:<nix32>"
	NarSize    uint64               `json:"narSize"`
	References []nixproto.StorePath `json:"references"`
	CA         string               `json:"ca,omitempty"`
}
