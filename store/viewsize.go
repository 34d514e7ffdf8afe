package store

import (
	"context"
	"math"

	"nbd/nixproto"
)

// ViewSize returns the bytes of all NARs in the view of an account, as if
// nothing were shared; ErrNotFound if there is no such account. It takes time in
// proportion to the size of the view.
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
	return size, err
}
