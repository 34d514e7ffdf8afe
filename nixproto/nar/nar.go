// Package nar reads and writes Nix archives: the serialisation of a file
// system tree of which a store path's contents and hash are made.
//
//	nar    = str("nix-archive-1") node
//	node   = str("(") str("type") body str(")")
//	body   = str("regular") [ str("executable") str("") ] str("contents") str(bytes)
//	       | str("symlink") str("target") str(target)
//	       | str("directory") { str("entry") str("(") str("name") str(name) str("node") node str(")") }
//	str(s) = u64 length, little endian; s; zeros up to a multiple of eight bytes
//
// The format is that of Nix's src/libutil/archive.cc and of the chapter "Nix
// Archive (NAR) Format" in its manual, read strictly: there is exactly one
// archive for a tree, and the parser takes no other bytes. Names are 1 to 255
// bytes, neither "." nor "..", without slash or NUL, and strictly increasing
// in byte order within a directory; targets are 1 to 4095 bytes without NUL;
// padding is zero; entries nest at most 64 levels deep (MaxDepth).
//
// A Parser is pushed the bytes of an archive as they arrive, in pieces of any
// size, and leaves an Index: what is in the archive, and where the contents of
// each file lie in it. It copies no contents, calls nothing back, and never
// looks past the archive's last byte, so that it can run on a protocol stream
// beside a hash. A Writer makes archives. Neither touches a file system.
package nar

import (
	"errors"
	"fmt"
	"strings"
)

// The bounds of an archive, besides those of Limits.
const (
	// MaxDepth is the Depth of the deepest entry: 64 levels, the root, at 0,
	// among them. Nix 2.35 and newer neither write nor read more.
	MaxDepth = 63
	// MaxNameLen is the longest name of a directory entry, in bytes.
	MaxNameLen = 255
	// MaxTargetLen is the longest target of a symbolic link, in bytes.
	MaxTargetLen = 4095
)

// ErrMalformed is what every error about the bytes of an archive or of an
// encoded index wraps.
var ErrMalformed = errors.New("malformed archive")

// ErrTooLarge is wrapped, besides ErrMalformed, by the error of an archive
// that is well-formed so far but passes a bound of Limits.
var ErrTooLarge = errors.New("archive has too many entries")

// A Kind is what an entry is.
type Kind uint8

// The kinds; the zero Kind is none of them.
const (
	Directory Kind = iota + 1
	Regular
	Symlink
)

// String returns the word that stands for k in an archive.
func (k Kind) String() string {
	switch k {
	case Directory:
		return "directory"
	case Regular:
		return "regular"
	case Symlink:
		return "symlink"
	}
	return fmt.Sprintf("nar.Kind(%d)", uint8(k))
}

// An Entry is one file, directory or symbolic link of an archive.
type Entry struct {
	Kind       Kind
	Executable bool   // of a regular file: its owner's x bit
	Depth      int    // 0 for the root
	Name       string // within its directory; "" for the root
	// Offset is where the contents of a regular file begin, counted in bytes
	// from the archive's first byte; 0 for other kinds. It is a multiple of 8.
	Offset int64
	Size   int64  // of the contents of a regular file, in bytes
	Target string // of a symbolic link
}

// checkName says why name cannot be the name of a directory entry.
func checkName(name string) error {
	switch {
	case name == "":
		return malformed("empty name")
	case len(name) > MaxNameLen:
		return malformed("name longer than %d bytes", MaxNameLen)
	case name == "." || name == "..":
		return malformed("name %q", name)
	case strings.IndexByte(name, '/') >= 0 || strings.IndexByte(name, 0) >= 0:
		return malformed("slash or NUL in name %q", name)
	}
	return nil
}

// checkTarget says why target cannot be that of a symbolic link.
func checkTarget(target string) error {
	switch {
	case target == "":
		return malformed("empty target of symbolic link")
	case len(target) > MaxTargetLen:
		return malformed("target of symbolic link longer than %d bytes", MaxTargetLen)
	case strings.IndexByte(target, 0) >= 0:
		return malformed("NUL in target of symbolic link")
	}
	return nil
}

// malformed returns an error that wraps ErrMalformed.
func malformed(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrMalformed, fmt.Sprintf(format, args...))
}

// pad returns how many zeros follow a string of n bytes.
func pad(n int64) int64 { return -n & 7 }
