package store

import (
	"time"

	"nbd/nixproto"
)

// GCOptions bound a collection of one view. The zero value deletes all that
// nobody uses.
type GCOptions struct {
	// OlderThan keeps paths, with their closures, that became valid less than
	// this long ago.
	OlderThan time.Duration
	// MaxFreed ends the collection once that many bytes of NARs were deleted;
	// 0 means no limit.
	MaxFreed uint64
	// DryRun reports what would be deleted, and deletes nothing.
	DryRun bool
	// Live reports what is alive instead; nothing is deleted.
	Live bool
}

// GCResult says what a collection or deletion did.
type GCResult struct {
	Paths []nixproto.StorePath // deleted, or that would be
	Freed uint64               // bytes of their NARs, as if nothing were shared
}
