package nixproto

import (
	"errors"
	"fmt"
	"strings"
)

// StoreDir is the only store directory nbd serves.
const StoreDir = "/nix/store"

// HashPartLen is the number of characters in the hash part of a store path.
const HashPartLen = 32

// MaxNameLen is the longest name of a store path, in bytes.
const MaxNameLen = 211

// ErrOtherStore says that a path lies outside StoreDir.
var ErrOtherStore = errors.New("not in " + StoreDir)

// A StorePath is an absolute path of an object in the store,
// "/nix/store/<32 characters>-<name>", as it travels on the wire. The empty
// StorePath means absent. Values made by ParseStorePath are well-formed;
// code below the parsers relies on it.
type StorePath string

// ParseStorePath checks and returns an absolute store path. It refuses paths
// below a store object, other store directories (ErrOtherStore), hash parts
// that are not nix32, and names that Nix would refuse.
func ParseStorePath(s string) (StorePath, error) {
	base, ok := strings.CutPrefix(s, StoreDir+"/")
	if !ok {
		return "", fmt.Errorf("store path %q: %w", clip(s), ErrOtherStore)
	}
	return ParseBaseName(base)
}

// ParseBaseName returns the store path of a base name, "<32 characters>-<name>".
func ParseBaseName(base string) (StorePath, error) {
	if len(base) < HashPartLen+2 || base[HashPartLen] != '-' {
		return "", fmt.Errorf("store path %q: no hash part", clip(base))
	}
	for i := range HashPartLen {
		if nix32Value(base[i]) < 0 {
			return "", fmt.Errorf("store path %q: bad character in hash part", clip(base))
		}
	}
	if err := CheckName(base[HashPartLen+1:]); err != nil {
		return "", fmt.Errorf("store path %q: %w", clip(base), err)
	}
	return StorePath(StoreDir + "/" + base), nil
}

// CheckName reports why name cannot be the name of a store path: its length,
// a character other than [0-9a-zA-Z+-._?=], or one of the names "." and ".."
// alone or followed by a dash.
func CheckName(name string) error {
	if name == "" {
		return errors.New("name is empty")
	}
	if len(name) > MaxNameLen {
		return fmt.Errorf("name is longer than %d bytes", MaxNameLen)
	}
	if name == "." || name == ".." || strings.HasPrefix(name, ".-") || strings.HasPrefix(name, "..-") {
		return fmt.Errorf("name %q is not allowed", name)
	}
	for i := range len(name) {
		c := name[i]
		switch {
		case c >= '0' && c <= '9', c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z':
		case strings.IndexByte("+-._?=", c) >= 0:
		default:
			return fmt.Errorf("name %q has a character that is not allowed", clip(name))
		}
	}
	return nil
}

// Base returns the path without the store directory.
func (p StorePath) Base() string { return strings.TrimPrefix(string(p), StoreDir+"/") }

// HashPart returns the 32 characters that identify the object.
func (p StorePath) HashPart() string { return p.Base()[:HashPartLen] }

// Name returns what follows the hash part and its dash.
func (p StorePath) Name() string { return p.Base()[HashPartLen+1:] }

// IsDerivation reports whether the path names a derivation file.
func (p StorePath) IsDerivation() bool { return strings.HasSuffix(string(p), ".drv") }

// clip keeps hostile text out of error messages: at most 120 bytes of it.
func clip(s string) string {
	if len(s) > 120 {
		return s[:120] + "…"
	}
	return s
}
