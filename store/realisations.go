package store

import (
	"context"
	"fmt"

	bolt "go.etcd.io/bbolt"

	"nbd/nixproto"
)

// realisationKey returns the key of an output of a derivation.
func realisationKey(drvHash nixproto.Hash, output string) []byte {
	k := append([]byte{byte(drvHash.Algo())}, drvHash.Bytes()...)
	return append(k, output...)
}

// AddRealisation stores r in the view; an earlier one of the same output is
// replaced. An output path that is not in the view is ErrInvalid.
func (s *Store) AddRealisation(ctx context.Context, a AccountID, r *nixproto.Realisation) error {
	if r.DrvHash.IsZero() || r.OutputName == "" {
		return fmt.Errorf("%w realisation: it names no output of a derivation", ErrInvalid)
	}
	return s.update(func(tx *bolt.Tx) error {
		v, err := openView(tx, a)
		if err != nil {
			return err
		}
		if !v.has(r.OutPath) {
			return fmt.Errorf("%w realisation: %s is not valid", ErrInvalid, r.OutPath)
		}
		return v.realisations().Put(realisationKey(r.DrvHash, r.OutputName), append([]byte{jsonVersion}, r.JSON()...))
	})
}

// Realisation returns the realisation of an output of the derivation with that
// hash modulo, or ErrNotFound; also if the output path is not in the view any
// more.
func (s *Store) Realisation(ctx context.Context, a AccountID, drvHash nixproto.Hash, output string) (*nixproto.Realisation, error) {
	var r nixproto.Realisation
	err := s.readView(a, func(v *view) error {
		b := v.realisations().Get(realisationKey(drvHash, output))
		if b == nil {
			return fmt.Errorf("realisation of %s!%s: %w", drvHash, output, ErrNotFound)
		}
		if b[0] != jsonVersion {
			return fmt.Errorf("realisation: %w: version %d", ErrDamaged, b[0])
		}
		var err error
		if r, err = nixproto.ParseRealisation(b[1:]); err != nil {
			return fmt.Errorf("%w: %w", ErrDamaged, err)
		}
		if !v.has(r.OutPath) {
			return fmt.Errorf("realisation of %s!%s: %w", drvHash, output, ErrNotFound)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &r, nil
}
