// Calling the cache service from Go with nothing but its .proto file.
//
// With what Debian 12 and Ubuntu install, and no module downloaded, scripts/examples/go/run does it all:
//
//	apt-get install golang-go golang-google-grpc-dev golang-google-protobuf-dev golang-google-genproto-dev \
//	    protobuf-compiler protoc-gen-go protoc-gen-go-grpc
//	scripts/examples/go/run ["a prompt"] [FILE]
//
// CACHESERVER_ADDRESS is where the service is (127.0.0.1:50051), CACHESERVER_TOKEN the token where it has callers. Off
// loopback a program of yours connects with credentials.NewTLS in place of grpc.WithInsecure.
//
// Debian 12 has gRPC 1.33 for Go. It follows a retry policy only with GRPC_GO_RETRY=on in its environment, and needs the
// codec below; both are of no use from 1.40 on.
package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	pb "github.com/cacheserver/cacheserver/gen/go/promptcache/v1"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

const (
	generation = 120 * time.Second // deadline of a call that may have to generate
	look       = 10 * time.Second  // deadline of a call that only looks
	callsMax   = 4
	answerMax  = 64 << 20 // bytes
)

// UNAVAILABLE is the one code that means "try again". gRPC itself does so for calls with one answer, after the time that
// the service names (grpc-retry-pushback-ms) or, where it names none, after a growing pause.
const serviceConfig = `{
  "methodConfig": [{
    "name": [{"service": "promptcache.v1.PromptCacheService", "method": "GetImage"}],
    "retryPolicy": {
      "maxAttempts": 4,
      "initialBackoff": "0.2s",
      "maxBackoff": "5s",
      "backoffMultiplier": 2,
      "retryableStatusCodes": ["UNAVAILABLE"]
    }
  }]
}`

// codec is gRPC's own for the messages that protoc-gen-go makes now; that of Debian 12 knows only those of before 2020.
type codec struct{}

func (codec) Marshal(message interface{}) ([]byte, error) {
	return proto.Marshal(message.(proto.Message))
}

func (codec) Unmarshal(data []byte, message interface{}) error {
	return proto.Unmarshal(data, message.(proto.Message))
}

func (codec) Name() string { return "proto" }

// details is what the service says of an error beside its text: for programs.
type details struct {
	reason string
	fields []string
	retry  time.Duration
}

// why reads the details; none are there if the error never reached the service.
func why(err error) details {
	var known details
	for _, detail := range status.Convert(err).Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			known.reason = detail.Reason
		case *errdetails.RetryInfo:
			known.retry = time.Duration(detail.RetryDelay.Seconds)*time.Second + time.Duration(detail.RetryDelay.Nanos)
		case *errdetails.BadRequest:
			for _, violation := range detail.FieldViolations {
				known.fields = append(known.fields, violation.Field)
			}
		}
	}
	return known
}

// download writes a picture of any size to a file and tells how many calls it took.
//
// A call that breaks off is made again. Once the picture is known, the next one asks for it by its key, from the byte
// that is missing, and only if it still has the same digest: it never pays, and never mixes two pictures.
func download(ctx context.Context, client pb.PromptCacheServiceClient, request *pb.GetImageRequest, file string) (int, error) {
	out, err := os.Create(file)
	if err != nil {
		return 0, err
	}
	defer out.Close()
	var (
		image  *pb.Image
		offset int64
		hash   = sha256.New()
	)
	once := func() error {
		asked := &pb.StreamImageRequest{Request: request}
		if image != nil {
			byKey := &pb.GetImageRequest{What: &pb.GetImageRequest_Key{Key: image.Key}}
			asked = &pb.StreamImageRequest{Request: byKey, ReadOffset: offset, IfDigest: image.Digest}
		}
		ctx, cancel := context.WithTimeout(ctx, generation)
		defer cancel()
		stream, err := client.StreamImage(ctx, asked)
		if err != nil {
			return err
		}
		for {
			response, err := stream.Recv()
			if err == io.EOF {
				return nil
			}
			if err != nil {
				return err
			}
			switch event := response.Event.(type) {
			case *pb.StreamImageResponse_Progress:
				fmt.Printf("waiting, about %d s more\n", event.Progress.EstimatedWait.GetSeconds())
			case *pb.StreamImageResponse_Header:
				image = event.Header.Image
			case *pb.StreamImageResponse_Chunk:
				written, err := io.MultiWriter(out, hash).Write(event.Chunk)
				offset += int64(written)
				if err != nil {
					return err
				}
			}
		}
	}
	calls := 1
	for err = once(); err != nil; err = once() {
		if status.Code(err) != codes.Unavailable || calls == callsMax {
			return calls, err
		}
		pause := why(err).retry
		if pause == 0 {
			pause = 200 * time.Millisecond << calls
		}
		time.Sleep(pause)
		calls++
	}
	if image.GetDigest() != fmt.Sprintf("sha256:%x", hash.Sum(nil)) {
		return calls, errors.New("the bytes are not those announced")
	}
	return calls, out.Close()
}

// get is one call with its deadline.
func get(ctx context.Context, client pb.PromptCacheServiceClient, request *pb.GetImageRequest, within time.Duration) (*pb.GetImageResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	return client.GetImage(ctx, request)
}

func of(spec *pb.ImageSpec) *pb.GetImageRequest {
	return &pb.GetImageRequest{What: &pb.GetImageRequest_Spec{Spec: spec}}
}

// run asks, asks again, fails on purpose, and downloads.
func run(address, token, prompt, file string) error {
	options := []grpc.DialOption{
		grpc.WithInsecure(),
		grpc.WithDefaultServiceConfig(serviceConfig),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(answerMax), grpc.ForceCodec(codec{})),
	}
	channel, err := grpc.Dial(address, options...)
	if err != nil {
		return err
	}
	defer channel.Close()
	client := pb.NewPromptCacheServiceClient(channel)
	ctx := context.Background()
	if token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
	}

	// The first call may generate; the second is a hit, with the very same bytes.
	request := of(&pb.ImageSpec{Prompt: prompt})
	first, err := get(ctx, client, request, generation)
	if err != nil {
		return err
	}
	again, err := get(ctx, client, request, generation)
	if err != nil {
		return err
	}
	data := first.Images[0].GetData()
	isSame := bytes.Equal(data, again.Images[0].GetData())
	fmt.Printf("first from %s, again from %s, same bytes: %t\n", first.Status.Tier, again.Status.Tier, isSame)

	// What can go wrong has a code, which says whether to try again, and a published reason.
	missing := of(&pb.ImageSpec{Prompt: "never asked before"})
	missing.CachePolicy = pb.CachePolicy_CACHE_POLICY_ONLY_IF_CACHED
	wrong := of(&pb.ImageSpec{Prompt: prompt, Size: "17x99999"})
	for _, failing := range []struct {
		name    string
		request *pb.GetImageRequest
	}{{"only if cached", missing}, {"a wrong size", wrong}} {
		if _, err := get(ctx, client, failing.request, look); err != nil {
			known := why(err)
			fmt.Println(failing.name+":", status.Code(err), known.reason, strings.Join(known.fields, ","))
		}
	}

	// Images of any size: events while they come, into a file.
	calls, err := download(ctx, client, request, file)
	if err != nil {
		return err
	}
	written, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	fmt.Printf("downloaded to %s in %d calls, same bytes: %t\n", file, calls, bytes.Equal(data, written))
	return nil
}

// argument is the one at this place of the command line, or the value for when there is none.
func argument(place int, otherwise string) string {
	if len(os.Args) > place {
		return os.Args[place]
	}
	return otherwise
}

func main() {
	address := os.Getenv("CACHESERVER_ADDRESS")
	if address == "" {
		address = "127.0.0.1:50051"
	}
	err := run(address, os.Getenv("CACHESERVER_TOKEN"), argument(1, "a red fox in the snow"), argument(2, "fox.png"))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
