package store

import "nbd/nixproto"

// A Registration is one output that becomes valid.
type Registration struct {
	// Info describes the path. With Staged, NarHash and NarSize are taken from
	// it and may be left zero.
	Info nixproto.PathInfo
	// Staged holds the content; nil if the blob NarHash is stored already.
	Staged *Staged
}
