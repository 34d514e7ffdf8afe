package store

import (
	"context"
	"fmt"
	"time"

	bolt "go.etcd.io/bbolt"

	"nbd/nixproto"
)

// A Result is the first success stored under a reuse key. It says nothing of
// whether the outputs are still stored (HasBlob).
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
	NarHash    nixproto.Hash        `json:"narHash"`
	NarSize    uint64               `json:"narSize"` // bytes
	References []nixproto.StorePath `json:"references"`
	CA         string               `json:"ca,omitempty"`
}

// Result returns what is stored under a reuse key; ok is false if nothing is.
func (s *Store) Result(ctx context.Context, key [32]byte) (r *Result, ok bool, err error) {
	r = &Result{}
	err = s.db.View(func(tx *bolt.Tx) (err error) {
		ok, err = getJSON(tx.Bucket(bucketResults), key[:], r)
		return err
	})
	if err != nil {
		return nil, false, fmt.Errorf("result of %x: %w", key, databaseError(err))
	}
	if !ok {
		return nil, false, nil
	}
	return r, true, nil
}

// PutResult stores r under key unless there is a result already, and reports
// whether it did.
func (s *Store) PutResult(ctx context.Context, key [32]byte, r *Result) (stored bool, err error) {
	err = s.update(func(tx *bolt.Tx) error {
		b := tx.Bucket(bucketResults)
		if stored = b.Get(key[:]) == nil; !stored {
			return nil
		}
		return putJSON(b, key[:], r)
	})
	if err != nil {
		return false, fmt.Errorf("store result of %x: %w", key, err)
	}
	return stored, nil
}
