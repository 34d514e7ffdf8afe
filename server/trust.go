package server

import (
	"context"

	"nbd/store"
)

// newSight returns what a client's account may use now. A session and its
// builds keep to it until they end.
func (s *Server) newSight(ctx context.Context, c *Client) (*store.Sight, error) {
	return s.store.NewSight(c.Account.ID, store.Trust{}), ctx.Err()
}
