package admincli

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"nbd/server/adminapi"
)

func (a *flags) token() *cobra.Command {
	return group("token", "Tokens of accounts: create, list, revoke",
		completing(a.tokenCreate(), a.accountNames(1)), completing(a.tokenList(), a.accountNames(1)), completing(a.tokenRevoke(), a.accountNames(1)))
}

func (a *flags) tokenCreate() *cobra.Command {
	var req adminapi.NewToken
	var ttl time.Duration
	cmd := ask(a, "create ACCOUNT --name N", "Make a token and print it, this once", ExactArgs("ACCOUNT"),
		func(ctx context.Context, args []string) (t adminapi.AddedToken, err error) {
			if req.Name == "" {
				return t, UsageError{fmt.Errorf("a token needs a --name")}
			}
			if ttl < 0 || ttl%time.Second != 0 {
				return t, UsageError{fmt.Errorf("--ttl is a number of whole seconds, like 90s or 1h")}
			}
			req.Account, req.Seconds = args[0], int64(ttl/time.Second)
			return a.client().AddToken(ctx, req)
		},
		func(w io.Writer, t adminapi.AddedToken) { fmt.Fprintln(w, t.Secret) })
	cmd.Flags().StringVar(&req.Name, "name", "", "name by which it is listed and revoked")
	cmd.Flags().DurationVar(&ttl, "ttl", 0, "how long it is good, such as 1h; 0 for ever")
	permissionsFlag(cmd, &req.Permissions)
	return cmd
}

// permissionsFlag adds --permissions.
func permissionsFlag(cmd *cobra.Command, list *[]string) {
	cmd.Flags().StringSliceVar(list, "permissions", nil,
		"what it may do, of build:read, build:write, store:read, store:write, account:read, account:write (default: the account's default-permissions)")
}

func (a *flags) tokenList() *cobra.Command {
	return ask(a, "list [ACCOUNT]", "List tokens", cobra.MaximumNArgs(1),
		func(ctx context.Context, args []string) ([]adminapi.TokenInfo, error) {
			return a.client().Tokens(ctx, strings.Join(args, ""))
		},
		func(w io.Writer, list []adminapi.TokenInfo) {
			for _, t := range list {
				expires := "never"
				if !t.Expires.IsZero() {
					expires = t.Expires.Format(time.DateTime)
				}
				fmt.Fprintf(w, "%s\t%s\t%s\texpires %s\n", t.Account, t.Name, strings.Join(t.Permissions, ","), expires)
			}
		})
}

func (a *flags) tokenRevoke() *cobra.Command {
	return ask(a, "revoke ACCOUNT NAME", "End a token, and the connections that came with it", ExactArgs("ACCOUNT", "NAME"),
		func(ctx context.Context, args []string) (done, error) {
			return done{args[1]}, a.client().RemoveToken(ctx, args[0], args[1])
		}, printDone)
}
