package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"

	"nbd/nixproto"
)

// ViewSize returns the bytes of all NARs in the view of an account, as if
// nothing were shared, and of the logs that it has uploaded, as they are stored;
// ErrNotFound if there is no such account. It takes time in proportion to the
// size of the view.
func (s *Store) ViewSize(ctx context.Context, a AccountID) (size int64, err error) {
	err = s.readView(a, func(v *view) error {
		return v.each(func(p nixproto.StorePath, value []byte) error {
			rec, err := decodeRecord(p, value)
			if err != nil {
				return err
			}
			if n := int64(min(rec.NarSize, math.MaxInt64)); size <= math.MaxInt64-n {
				size += n
			}
			return ctx.Err()
		})
	})
	if err != nil {
		return 0, err
	}
	logs, err := s.drvLogSize(ctx, a)
	return size + min(logs, math.MaxInt64-size), err
}

// drvLogSize returns the bytes of the logs that an account has uploaded, with
// what a file takes at least.
func (s *Store) drvLogSize(ctx context.Context, a AccountID) (size int64, err error) {
	const least = 4 << 10
	dir, err := os.Open(s.drvLogDir(a))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	} else if err != nil {
		return 0, fmt.Errorf("size of logs: %w", err)
	}
	defer dir.Close()
	for ctx.Err() == nil {
		entries, err := dir.ReadDir(1000)
		if errors.Is(err, io.EOF) {
			return size, nil
		} else if err != nil {
			return 0, fmt.Errorf("size of logs: %w", err)
		}
		for _, e := range entries {
			info, err := e.Info()
			if errors.Is(err, fs.ErrNotExist) {
				continue // replaced meanwhile
			} else if err != nil {
				return 0, fmt.Errorf("size of logs: %w", err)
			}
			size += max(info.Size(), least)
		}
	}
	return 0, context.Cause(ctx)
}
