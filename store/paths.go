package store

import (
	"bytes"
	"context"
	"fmt"
	"slices"

	bolt "go.etcd.io/bbolt"

	"nbd/nixproto"
)

// Info returns what the account's view knows of a path, or ErrNotFound. The
// result is the caller's, but for the elements of its lists.
func (s *Store) Info(ctx context.Context, a AccountID, p nixproto.StorePath) (*nixproto.PathInfo, error) {
	r, err := s.lookupRecord(a, p)
	if err != nil {
		return nil, err
	}
	if r == nil {
		return nil, fmt.Errorf("path %s: %w", p, ErrNotFound)
	}
	return r.info(), nil
}

// Valid returns those of paths that are in the account's view, in their order.
func (s *Store) Valid(ctx context.Context, a AccountID, paths []nixproto.StorePath) ([]nixproto.StorePath, error) {
	valid := make([]nixproto.StorePath, 0, len(paths))
	// What becomes valid meanwhile moves from pending to the database, so that
	// it is looked for in this order.
	waiting := make(map[nixproto.StorePath]bool)
	for _, p := range paths {
		if s.pendingRecord(a, p) != nil {
			waiting[p] = true
		}
	}
	err := s.db.View(func(tx *bolt.Tx) error {
		v, err := openView(tx, a)
		if err != nil {
			return nil // an empty view
		}
		for _, p := range paths {
			if waiting[p] || v.has(p) {
				valid = append(valid, p)
			}
		}
		return nil
	})
	return valid, databaseError(err)
}

// All returns every path of the view, sorted.
func (s *Store) All(ctx context.Context, a AccountID) ([]nixproto.StorePath, error) {
	var all []nixproto.StorePath
	err := s.readView(a, func(v *view) error {
		return v.each(func(p nixproto.StorePath, _ []byte) error {
			all = append(all, p)
			return ctx.Err()
		})
	})
	return all, err
}

// readView runs f with the view of an account, brought up to date; ErrNotFound
// if there is no such account.
func (s *Store) readView(a AccountID, f func(v *view) error) error {
	return s.read(func(tx *bolt.Tx) error {
		v, err := openView(tx, a)
		if err != nil {
			return err
		}
		return f(v)
	})
}

// ByHashPart returns the path of the view with that hash part, or ErrNotFound.
func (s *Store) ByHashPart(ctx context.Context, a AccountID, part string) (p nixproto.StorePath, err error) {
	if len(part) != nixproto.HashPartLen {
		return "", fmt.Errorf("hash part of %d characters: %w", len(part), ErrNotFound)
	}
	err = s.readView(a, func(v *view) error {
		if p = v.byHashPart(part); p == "" {
			return fmt.Errorf("hash part %s: %w", part, ErrNotFound)
		}
		return nil
	})
	return p, err
}

// byHashPart returns the path of the view with that hash part, or "".
func (v *view) byHashPart(part string) nixproto.StorePath {
	prefix := []byte(part + "-")
	k, _ := v.paths.Cursor().Seek(prefix)
	if !bytes.HasPrefix(k, prefix) {
		return ""
	}
	return nixproto.StorePath(storePrefix + string(k))
}

// Referrers returns the paths of the view that refer to p, sorted; p itself is
// among them if it refers to itself. p not in the view is ErrNotFound. It takes
// time in proportion to the size of the view.
func (s *Store) Referrers(ctx context.Context, a AccountID, p nixproto.StorePath) (list []nixproto.StorePath, err error) {
	err = s.readView(a, func(v *view) error {
		if _, err := v.want(p); err != nil {
			return err
		}
		return v.referrers(map[string]bool{p.Base(): true}, func(r, _ nixproto.StorePath) error {
			list = append(list, r)
			return ctx.Err()
		})
	})
	return list, err
}

// ValidDerivers returns the derivations in the view that name p as an output,
// sorted. p need not be in the view.
func (s *Store) ValidDerivers(ctx context.Context, a AccountID, p nixproto.StorePath) (list []nixproto.StorePath, err error) {
	err = s.readView(a, func(v *view) error {
		return pairs(v.derivers(), p.Base(), func(base string) error {
			list = append(list, nixproto.StorePath(storePrefix+base))
			return nil
		})
	})
	return list, err
}

// AddSignatures adds signatures to a path of the view; those it has stay. They
// are not verified here. Not in the view: ErrNotFound.
func (s *Store) AddSignatures(ctx context.Context, a AccountID, p nixproto.StorePath, sigs []string) error {
	return s.update(func(tx *bolt.Tx) error {
		v, err := s.writeView(tx, a)
		if err != nil {
			return err
		}
		r, err := v.want(p)
		if err != nil {
			return err
		}
		have := len(r.Signatures)
		for _, sig := range sigs {
			if !slices.Contains(r.Signatures, sig) {
				r.Signatures = append(r.Signatures, sig)
			}
		}
		if len(r.Signatures) == have {
			return nil
		}
		if err := checkSignatures(len(r.Signatures)); err != nil {
			return err
		}
		slices.Sort(r.Signatures)
		return v.put(r)
	})
}
