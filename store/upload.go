package store

import "nbd/nixproto"

// UploadOptions say how an Upload treats what it is given. The zero value is
// an ordinary upload.
type UploadOptions struct {
	// Repair replaces the content of paths that are valid already.
	Repair bool
	// Verify, if not nil, is called for each path once its NAR is known to be
	// what info says, before it is added; an error refuses the path. It may
	// change info.Signatures.
	Verify func(info *nixproto.PathInfo) error
}
